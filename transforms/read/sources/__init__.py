"""Inputs that are no files of rows: SQL queries and tables of a lakehouse, whose rows are staged as Parquet."""
