"""The nouns of vcompress. Only the standard library is imported here."""
