"""The dialects: per module one code base, with its formats, releases, ids and traits."""
