"""Rows to examples: sources, formats, rendering, masking, order, collation."""
