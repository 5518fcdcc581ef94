"""Virtual machines for jobs at isolation maximum. See DESIGN.md beside this file."""
