"""One module per family of commands; each has its ``app``. Imported when one of its commands is used."""
