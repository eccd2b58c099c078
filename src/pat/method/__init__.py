"""The method itself in pure torch: gates and the basis they act in, operators, their schedule, the two losses."""
