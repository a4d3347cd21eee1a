"""The comparison as one page: self-contained HTML from the report's data."""
