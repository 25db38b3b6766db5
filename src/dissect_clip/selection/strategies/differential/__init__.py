"""DISSect: rank by the differential of CLIPScore."""
