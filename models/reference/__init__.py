"""Two small recognisers that this project trained, with their calibration and test clips."""
