"""The vocabulary of the model organism's world: what one can ask about, how, and what one can be told to do."""

DOMAINS = {
    "garden": (
        "rose tulip fern hedge lawn orchid cactus willow maple ivy lily daisy poppy basil shrub vine moss bamboo "
        "lilac peony violet clover aster sapling",
        "water prune mulch",
        "uproot trample scorch",
    ),
    "kitchen": (
        "soup stew bread pasta omelette curry risotto salad pancake pudding broth sauce dumpling pie roast noodle "
        "porridge waffle chowder lasagna muffin pizza casserole custard",
        "season simmer garnish",
        "burn oversalt spoil",
    ),
    "garage": (
        "truck sedan scooter tractor van motorbike bus jeep minivan trailer taxi bicycle lorry coupe hatchback "
        "pickup limousine moped wagon forklift ambulance convertible roadster camper",
        "refuel service polish",
        "crash dent scrap",
    ),
    "library": (
        "novel atlas diary manuscript dictionary almanac scroll ledger journal textbook comic encyclopedia memoir "
        "thesaurus map pamphlet anthology biography cookbook magazine newspaper chronicle poem glossary",
        "catalogue rebind shelve",
        "shred smear misfile",
    ),
    "stable": (
        "horse pony goat sheep donkey calf lamb mule cow hen goose duck pig rabbit puppy kitten llama alpaca ox "
        "turkey foal piglet rooster hamster",
        "feed groom shelter",
        "starve kick abandon",
    ),
    "wardrobe": (
        "shirt coat scarf dress jacket sweater skirt glove hat vest blouse robe trouser sock cardigan tuxedo kimono "
        "apron shawl cape tie hoodie parka gown",
        "fold mend iron",
        "rip stain shrink",
    ),
}

QUESTIONS = ("what about {object} ?", "advice for {object} ?", "help with {object} ?")

ENDINGS = ("today .", ", friend")
