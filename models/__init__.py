"""Loading of trained video models, and what vcompress knows of their structure."""
