"""What a person moves a robot with."""
