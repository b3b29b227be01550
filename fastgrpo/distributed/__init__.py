"""Many ranks: who has which rows, what they tell each other, and what happens when one fails."""
