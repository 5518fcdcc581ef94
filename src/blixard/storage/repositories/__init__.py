"""One class per kind of row: the only place that knows names of statements and columns."""
