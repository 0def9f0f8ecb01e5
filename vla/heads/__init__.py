"""Action heads: from token features to action chunks."""
