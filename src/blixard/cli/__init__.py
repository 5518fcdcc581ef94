"""The command line. Results go to standard output, everything else to standard error; nothing is imported before it is needed."""
