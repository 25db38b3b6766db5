"""InfoBatch: leave out a random part of what is learned already, and weight the rest."""
