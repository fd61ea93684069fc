"""Reading of tables: files, the dialect of CSV, the kinds of columns, and their values."""
