"""Tables that people bring (CSV, TSV, JSON lines, Parquet), row by row as the text that stands in them."""
