"""The proof: metrics, parity, latency, the gate and the report.

The judge shares no code with the judged: it is handed arrays and callables, and imports only
numpy and `vcompress.spec` (Jinja2 only to render the page).
"""
