"""What is read: rows of the data as examples with token ids, in order or as a stream, and text to calibrate on."""
