"""The flags, one file per group and one field per flag."""
