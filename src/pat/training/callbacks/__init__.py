"""What a trainer carries along: the gates' schedule and calibration, regularisers, guards, the live line."""
