"""The layers that execute the model's arithmetic on packed rows."""
