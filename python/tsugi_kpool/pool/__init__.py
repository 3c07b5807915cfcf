"""K-of-N pools: the PEFT method that builds them, what trains them, and what is exported."""
