"""What the importers of public archives share: files, tables, joins, id lists, counts."""
