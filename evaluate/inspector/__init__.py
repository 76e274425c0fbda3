"""One HTML page to look inside an IMAE model on texts: its gates and predictions on every token."""
