"""The flags, one file for each group. A flag is one field."""
