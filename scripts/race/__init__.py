"""A race by updates and by CPU seconds: K-FAC, Muon, SOAP, Adam and SGD, tuned alike."""
