"""Operators: `library` names them and chooses a backend; every other module here is one backend."""
