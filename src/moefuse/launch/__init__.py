"""Making layers on several machines."""
