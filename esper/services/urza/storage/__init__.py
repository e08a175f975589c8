"""Tables in a database, and content in a blob store."""
