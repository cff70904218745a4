"""What is legal."""
def verify(program): pass
