"""What came out: tables, claims, figures, the report."""
