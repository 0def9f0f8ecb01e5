"""Action tokenizers: from chunks of numbers to tokens, and back."""
