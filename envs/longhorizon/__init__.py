"""Long-horizon work on the table: skills, tasks of two to eight of them, and worlds of three fidelities."""
