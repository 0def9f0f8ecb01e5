"""MuJoCo: worlds, cameras, kinematics, actuation, randomisation, batches of worlds."""
