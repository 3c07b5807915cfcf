"""What training a pool costs, on one machine and over a link, and what becomes of it when a rank fails."""
