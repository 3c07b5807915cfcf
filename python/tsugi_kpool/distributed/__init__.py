"""What happens between processes: gradients are aggregated, ranks agree, nodes measure their phase."""
