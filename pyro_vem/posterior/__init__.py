"""What one does with a fit: diagnosis, ArviZ, NUTS, plots."""
