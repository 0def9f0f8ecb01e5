"""From typed words to a function call: compose the config, check it against the signature, run it."""
