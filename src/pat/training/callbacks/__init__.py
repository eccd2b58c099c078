"""Callbacks of the trainers: the gates' schedule and calibration, regularisers, guards, the live line."""
