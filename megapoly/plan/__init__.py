"""What a run will need, in closed form and before it starts: memory and communication of every rank."""
