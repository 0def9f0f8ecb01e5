"""Vision-language-action models: backbones, heads, training, checkpoints."""
