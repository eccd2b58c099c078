"""Speed and memory of a model beside the one it was made from, and beside what was predicted for it."""
