"""Questions that stand for a test set: word problems written by hand, problems in LaTeX, and those of generators."""

from __future__ import annotations

from typing import Any

WORD_PROBLEMS = (
    "Maria baked 48 cookies for the school fair on Monday. On Tuesday she baked half as many cookies. How many cookies "
    "did Maria bake altogether?",
    "A farmer has 120 sheep and 45 goats on his land. He sells 30 sheep at the market and buys 12 goats from a "
    "neighbour. How many animals does the farmer have now?",
    "A train travels from Leeds to York at a speed of 60 miles per hour. The journey takes 3 hours. How far is it from "
    "Leeds to York?",
    "Omar saves 15 dollars every week from his pocket money. He wants to buy a bicycle that costs 240 dollars. How "
    "many "
    "weeks must Omar save before he can buy the bicycle?",
    "A water tank holds 500 litres when it is full. It loses 25 litres each hour through a leak. After how many "
    "hours is "
    "only 300 litres of water left in the tank?",
    "In a class of 32 pupils, 18 pupils play football and 14 pupils play chess. There are 6 pupils who play both. How "
    "many pupils play neither football nor chess?",
    "A baker uses 3 eggs and 250 grams of flour for one cake. He has 20 eggs and 1500 grams of flour in the kitchen. "
    "What "
    "is the greatest number of cakes that he can bake?",
    "Lena reads 24 pages of her novel every evening. The novel has 360 pages and she has already read 120 of them. How "
    "many more evenings does Lena need to finish the novel?",
    "A rectangular garden is 14 metres long and 9 metres wide. A path of width 1 metre runs all the way around the "
    "garden on the outside. What is the area of the path in square metres?",
    "Three friends share a bill of 84 dollars at a restaurant. Anna pays twice as much as Boris, and Clara pays 4 "
    "dollars "
    "more than Boris. How much does Clara pay?",
    "A shop sells pencils in boxes of 12 and erasers in packets of 5. Mr Lopez buys 7 boxes of pencils and 9 packets "
    "of "
    "erasers. How many objects did he buy in total?",
    "A jacket costs 80 dollars in a store. During a sale its price is reduced by 25 percent, and a coupon takes "
    "another 10 "
    "dollars off. What does the customer pay for the jacket?",
    "The sum of the ages of a father and his son is 50 years. In 5 years the father will be three times as old as his "
    "son. How old is the son today?",
    "A cyclist rides 18 kilometres in 45 minutes along a flat road. If she keeps the same speed, how many kilometres "
    "does "
    "she ride in 2 hours?",
    "A bag contains 5 red marbles, 7 blue marbles and 8 green marbles. One marble is drawn at random from the bag. "
    "What "
    "is the probability that the marble is not green?",
    "Two pipes fill a swimming pool. The first pipe alone needs 6 hours and the second pipe alone needs 4 hours. How "
    "long "
    "do both pipes together need to fill the pool?",
    "A company employs 240 workers, of whom 60 percent work in the factory. One quarter of the remaining workers drive "
    "lorries. How many workers drive lorries?",
    "Sofia has 2 brothers who are each 3 years older than she is. The mean age of the three children is 12 years. "
    "How old "
    "is Sofia?",
    "A library owns 3600 books about history and science. For every 4 books about history there are 5 books about "
    "science. How many books about science does the library own?",
    "A taxi charges 4 dollars at the start of each ride and 2 dollars for every kilometre. Peter paid 30 dollars for "
    "his "
    "ride to the airport. How many kilometres was the ride?",
    "A snail climbs a wall that is 10 metres high. By day it climbs 3 metres, and at night it slides back 2 metres. On "
    "which day does the snail reach the top of the wall?",
    "A printer produces 35 pages in a minute, and a newer printer produces 55 pages in a minute. They work at the same "
    "time on a job of 1800 pages. How many minutes does the job take?",
    "A gardener plants 8 rows of tulips with 15 tulips in each row. A frost kills one fifth of the tulips. How many "
    "tulips "
    "survive the frost?",
    "A ship leaves the harbour at 8 in the morning and sails 22 kilometres every hour. A second ship follows at 10 "
    "in the "
    "morning and sails 33 kilometres every hour. When does the second ship catch up with the first?",
    "Nadia mixes 300 millilitres of juice with 700 millilitres of water. She pours the drink into glasses of 125 "
    "millilitres. How many glasses can she fill?",
    "A theatre has 25 rows with 18 seats in each row. On Friday evening 387 seats were taken. How many seats were "
    "empty on "
    "Friday evening?",
    "A worker earns 14 dollars an hour for the first 40 hours of a week and 21 dollars for every hour beyond that. "
    "Last "
    "week he worked 46 hours. How much did he earn last week?",
    "A rope of 72 metres is cut into two pieces. One piece is 5 times as long as the other piece. How long is the "
    "shorter "
    "piece in metres?",
    "The students of a school plant 560 trees in 4 days. On every day they plant 20 trees more than on the day "
    "before. How "
    "many trees do they plant on the last day?",
    "A car uses 7 litres of fuel on 100 kilometres. Its tank holds 42 litres. How many kilometres can the car drive "
    "with a "
    "full tank?",
    "Emil and Vera have 96 stickers together. When Emil gives 10 stickers to Vera, both have the same number of "
    "stickers. "
    "How many stickers did Vera have at the beginning?",
    "An orchard has apple trees and pear trees in the ratio of 7 to 3. There are 64 more apple trees than pear "
    "trees. How "
    "many trees are there in the orchard?",
    "A clock strikes once at one o'clock, twice at two o'clock and so on up to twelve. It does not strike at any other "
    "time. How many times does it strike between 6 in the morning and 11 in the morning, both included?",
    "A carpenter cuts planks of 240 centimetres into shelves of 35 centimetres. Each cut wastes nothing. He needs 50 "
    "shelves. How many planks must he buy?",
    "The population of a village was 1250 people ten years ago. Since then it has grown by 8 percent. How many people "
    "live in the village today?",
    "Jonas buys 6 notebooks for 2.50 dollars each and 3 pens for 1.20 dollars each. He pays with a note of 20 "
    "dollars. How "
    "much change does he get?",
)
"""Each is a problem of its own: no two share a story."""

OTHER_ASKS = (  # the same story and the same numbers, another question: (place in WORD_PROBLEMS, the new last sentence)
    (0, "How many cookies fewer did Maria bake on Tuesday than on Monday?"),
    (1, "How many goats does the farmer have in the end?"),
    (3, "How many dollars does Omar still lack after 10 weeks?"),
    (4, "How many litres of water leak out of the tank in one day?"),
    (5, "How many pupils play football but not chess?"),
    (6, "How many grams of flour does he need for 5 cakes?"),
    (8, "What is the perimeter of the outer edge of the path in metres?"),
    (9, "How much more does Anna pay than Clara?"),
    (10, "How many more pencils than erasers did he buy?"),
    (14, "What is the probability that the marble is red?"),
    (16, "How many workers neither work in the factory nor drive lorries?"),
    (18, "How many books about history does the library own?"),
    (22, "How many tulips did the frost kill?"),
    (25, "What percentage of the seats was taken on Friday evening?"),
    (26, "By how much would his pay rise if he worked 2 hours longer?"),
    (27, "What is the difference between the lengths of the pieces in metres?"),
    (30, "How many stickers did Emil have more than Vera at the beginning?"),
    (35, "How much do the notebooks cost altogether?"),
)

LATEX = (
    r"Find all real solutions of $x^{2} - 5x + 6 = 0$.",
    r"Simplify the expression $\frac{3}{4} + \frac{5}{6} \cdot \frac{2}{3}$.",
    r"Let $f(x) = \frac{2x + 1}{x - 3}$. Compute $f(5)$.",
    r"Evaluate $\sqrt{144} + \sqrt{81} - 2^{3}$.",
    r"If $3x + 7 \leq 25$, what is the greatest integer value of $x$?",
    r"Find the derivative of $g(t) = 4t^{3} - 6t^{2} + 9$ at $t = 2$.",
    r"The vertices of a triangle are $(0, 0)$, $(6, 0)$ and $(2, 5)$. What is its area?",
    r"Compute the value of $\left( \frac{2}{5} \right)^{2} \times 75$.",
    r"Solve the system $2x + y = 11$, $x - 3y = -12$ for $x$ and $y$.",
    r"For how many integers $n$ is $\frac{n + 24}{n}$ an integer?",
    r"What is the remainder when $7^{100}$ is divided by $13$?",
    r"Determine the sum of all positive divisors of $360$.",
    r"If $\log_{2} x = 5$ and $\log_{3} y = 4$, what is $x + y$?",
    r"A circle has the equation $x^{2} + y^{2} - 4x + 6y = 12$. Find its radius.",
    r"Evaluate the integral $\int_{0}^{3} (2x + 4) \, dx$.",
    r"In triangle $ABC$, $\angle A = 40^{\circ}$ and $\angle B = 75^{\circ}$. Find $\angle C$ in degrees.",
    r"The sequence is given by $a_{1} = 2$ and $a_{n+1} = 3a_{n} - 1$. Find $a_{5}$.",
    r"How many subsets of $\{1, 2, 3, 4, 5, 6, 7\}$ contain no two consecutive numbers?",
    r"Let $p$ and $q$ be the roots of $2x^{2} - 9x + 4 = 0$. Compute $p^{2} + q^{2}$.",
    r"A fair coin is tossed $8$ times. What is the probability of exactly $3$ heads?",
    r"Find the distance between the points $(-2, 3)$ and $(4, 11)$.",
    r"What is the coefficient of $x^{4}$ in the expansion of $(2x - 3)^{6}$?",
    r"Simplify $\frac{x^{2} - 16}{x + 4}$ for $x \neq -4$.",
    r"Find the least positive integer $k$ such that $k \equiv 3 \pmod{7}$ and $k \equiv 5 \pmod{11}$.",
)

CHOICES = (  # question, options
    ("Which planet of the solar system has the most moons?", ("Mars", "Saturn", "Venus", "Earth")),
    ("Which of these numbers is divisible by both 6 and 8?", ("36", "48", "54", "64")),
    ("What gas do plants take from the air for photosynthesis?", ("oxygen", "carbon dioxide", "nitrogen", "helium")),
    ("Which fraction is the largest of all?", ("2/3", "5/8", "3/5", "7/12")),
    ("In which year did the first human walk on the moon?", ("1965", "1969", "1972", "1961")),
    ("A die is rolled twice. What is the probability of two sixes?", ("1/6", "1/12", "1/36", "1/18")),
    ("Which metal is liquid at room temperature?", ("iron", "mercury", "sodium", "lead")),
    ("What is the next number in the sequence 2, 6, 12, 20?", ("28", "30", "32", "26")),
    ("Which of these animals is a mammal that lays eggs?", ("bat", "platypus", "dolphin", "kangaroo")),
    ("A square has a diagonal of 10 cm. What is its area?", ("25 cm", "50 cm", "75 cm", "100 cm")),
)

GYM = (
    "chain_sum", "simple_equations", "gsm_symbolic", "basic_arithmetic", "fraction_simplification", "gcd", "lcm",
    "prime_factorization", "word_sorting", "letter_counting", "family_relationships", "calendar_arithmetic",
    "leg_counting", "number_sorting", "spell_backward", "time_intervals", "products", "polynomial_equations",
    "propositional_logic", "knights_knaves", "syllogism", "number_sequence", "count_primes", "decimal_arithmetic",
)  # fmt: skip


def generated(name: str, count: int, seed: int) -> list[str]:
    """Questions of one of reasoning-gym's generators."""
    import reasoning_gym

    found: Any = reasoning_gym.create_dataset(name, size=count, seed=seed)
    return [found[i]["question"] for i in range(count)]


def chains(count: int, side: str) -> list[str]:
    """Questions of the package's own task."""
    from ottava import tasks
    from ottava.tasks.base import generator

    task = tasks.get("chains")
    return [p.question for p in task.sample(generator(5, side), 5, count, side)]  # type: ignore[arg-type]


def choice(question: str, options: tuple[str, ...]) -> str:
    """A question with its options as tests print them."""
    return question + "\n" + "\n".join(f"{letter}) {text}" for letter, text in zip("ABCDEFGH", options, strict=False))


SAME_TOPIC = (
    "Ben bakes bread for the school fair. Each loaf needs 400 grams of flour and he has 6 kilograms of flour. How "
    "many loaves "
    "can Ben bake?",
    "A farmer has 80 cows and twice as many hens on his farm. How many legs do all his animals have?",
    "A train leaves Leeds at 9 in the morning and arrives in London 2 hours and 15 minutes later. When does it arrive?",
    "Omar spends 6 dollars on sweets every week and 9 dollars on comics every month. How much does he spend in a year?",
    "A water tank with a square base of 2 metres is filled to a height of 3 metres. How many litres of water does it "
    "hold?",
    "In a class of 28 pupils there are 4 more girls than boys. How many girls are in the class?",
    "A cake is cut into 12 equal slices. Tom eats 2 slices and his sister eats a quarter of the cake. What fraction "
    "of the "
    "cake is left?",
    "Lena writes 3 pages of her diary every evening. After how many evenings is a diary of 96 pages full?",
    "A rectangular garden has a perimeter of 50 metres and is 5 metres longer than wide. What is its area?",
    "Three friends play cards. Anna wins 5 rounds more than Boris, and together they win 21 rounds. How many did "
    "Boris win?",
    "A shop sells pencils at 40 cents and erasers at 65 cents. What do 8 pencils and 3 erasers cost?",
    "A cyclist climbs a pass of 12 kilometres in 80 minutes and comes down in 20 minutes. What was her average speed?",
    "A bag contains red and blue marbles in the ratio of 2 to 3. There are 30 marbles. How many marbles are red?",
    "One pipe empties a swimming pool in 8 hours. After 3 hours it is closed. What part of the pool is still full?",
    "A company pays each of its 45 workers 120 dollars a day. What does it pay in a week of 5 days?",
    "The mean of four numbers is 12, and three of the numbers are 8, 10 and 17. What is the fourth number?",
    "A library lends 230 books on Monday and 185 books on Tuesday, and gets 97 books back. How many books are out?",
    "A taxi drives 24 kilometres in 36 minutes. How fast does it go in kilometres per hour?",
    "A theatre sold 320 tickets at 15 dollars and 150 tickets at 9 dollars. How much money did it take?",
    "A rope is 24 metres long. How many pieces of 150 centimetres can be cut from it?",
    r"Find all real solutions of $x^{3} - 4x = 0$.",
    r"Simplify the expression $\frac{3}{4} \cdot \frac{5}{6} + \frac{2}{3}$.",
    r"Let $f(x) = \frac{x - 3}{2x + 1}$. Compute $f(5)$.",
    r"Find the integral of $g(t) = 4t^{3} - 6t^{2} + 9$ from $t = 0$ to $t = 2$.",
    r"A circle has the equation $x^{2} + y^{2} - 4x + 6y = 12$. Find its centre.",
    r"How many subsets of $\{1, 2, 3, 4, 5, 6, 7\}$ contain at least two odd numbers?",
    r"Let $p$ and $q$ be the roots of $2x^{2} - 9x + 4 = 0$. Compute $pq$.",
)
