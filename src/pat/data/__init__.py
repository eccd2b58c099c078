"""Data: rows of files and hubs, of whatever form, become the tokens that a run is trained and measured on."""
