"""The zygote: a single-threaded Python process that every runner is forked from. See ../DESIGN.md."""
