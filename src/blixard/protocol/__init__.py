"""What travels between clients, workers and the server, and where to. The store's rows and the domain's values may change without it."""
