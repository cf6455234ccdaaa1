"""What the made speakers say: templates and word lists of our own, in English and Mandarin.

Rich in what moves lips: bilabials and labiodentals that close them, rounded and open vowels.
Every slot takes a word of its list, so that the templates give many thousands of sentences.
"""

from __future__ import annotations

import re

import numpy as np

LANGUAGES = ("en", "cmn")

_EN = """
{person} {bought} {a_thing} for {person2} {when}.
{person} and {person2} {moved} the {thing} to the {place}.
Why would {person} put {a_thing} in my {place}?
I believe {person} {bought} more {food} than we {could} eat.
{when_cap}, the {animal} {jumped} over {a_thing} near the {place}.
Please {bring} me some {food} and a cup of {drink}.
Our {adj} {animal} never {moved} far from the {place}.
{person} loves {food}, but {person2} would rather have {drink}.
How far is the {place} from {person}'s {adj} {place2}?
You should {bring} {a_thing} before the {adj} {animal} wakes up.
Nobody in the {place} saw {person} or the {adj} {thing}.
Wow! That is a very {adj} {animal}, {person}.
We heard {number} people laugh in the {place} {when}.
Oh no, {person} dropped {number} {things} on the floor.
If it rains {when}, we will move the {things} to the {place}.
The {adj} {animal} and the {adj2} {animal2} became best friends.
My {family} always {bought} {food} {when}.
May I borrow your {adj} {thing}, or is it for {person}?
Open your mouth wide and say {food}, {person}.
Both of them were far too {adj} to walk around the {place}.
Five brave {animals} flew over the {adj} {place}.
What a {adj} voice {person} has, and what a {adj2} poem!
Give {person} the {thing} and bring the {things} to me.
Perhaps the {family} of {person} owns {number} {adj} {animals}.
"""

_EN_WORDS = """
person: Papa|Bob|Emma|Mabel|Tom|Fiona|Paul|Amber|Owen|Victor|Molly|Sophie|Robin|Joy|Pam|Oliver|Maya|Ruth
person2: my mother|Barbara|Peter|Phoebe|Mark|Eva|Hugo|Bianca|the farmer|our boss|Moe|Vivian|your brother
bought: bought|found|wrapped|brought|saved|picked up|borrowed|made|painted
moved: moved|pushed|pulled|rolled|wandered|walked|floated
jumped: jumped|bounced|flew|climbed|hopped
could: could|might|should ever|may
bring: bring|show|pour|save|offer|move
a_thing: a purple boat|an old violin|a big blue balloon|a warm coat|a wooden bowl|a broken phone|\
a famous map|a heavy box|an apple pie|a silver spoon|a movie poster|a rubber boot|an open umbrella
thing: piano|table|robot|lamp|bamboo chair|football|red wagon|mirror|puppet|book|wool carpet|bottle
things: bottles|pumpkins|boxes|paper boats|photos|marbles|bananas|old books|balloons|maps
place: museum|farm|harbour|bathroom|library|park|village|market|beach|workshop|moon|airport|office|forest
place2: room|barn|home|apartment|boat|shop|laboratory
food: bread and butter|mushroom soup|apples|pepper|watermelon|popcorn|beef|plums|waffles|oatmeal|mango|beans
drink: water|warm milk|coffee|plum juice|lemonade|black tea
animal: elephant|rabbit|puppy|wolf|beaver|monkey|owl|bear|buffalo|camel|lamb|fox|parrot
animal2: mouse|pony|whale|goat|bumblebee|lion|baboon|dove
animals: doves|pigeons|bees|bats|swallows|wild geese|moths
adj: beautiful|warm|purple|famous|small|funny|fat|awful|modern|popular|blue|proud|brown|wonderful|lovely|calm
adj2: huge|wise|smooth|shy|marvellous|good|foolish|happy
number: four|five|a hundred|twelve|forty-four|about seven|fifteen
family: mother|father|brother|grandpa|whole family|uncle
when: today|tomorrow morning|before breakfast|on Monday|after the movie|every evening|at half past four
when_cap: Before supper|One summer evening|By the morning|On Friday|Above all|At about noon
"""

_CMN = """
{person}{when}买了{thing}。
{person}跟{person2}一起去{place}。
我的{family}最爱吃{food}。
{when}我们把{thing}搬到{place}里。
你为什么不给{person}{thing}？
{person}怕{animal}，可是不怕{animal2}。
请把{food}放在桌子上，好吗？
{animal}跑到{place}外面去了。
{person}说{place}的{food}又{taste}又便宜。
哇！那只{animal}真{looks}！
{when}有{number}个朋友在{place}跳舞。
{family}每天都要喝{drink}，不喝{drink2}。
如果{when}下雨，我们就不去{place}了。
{person2}的{thing}比我的{looks}。
请问，从这里到{place}有多远？
{person}用{number}块钱买了{food}和{drink}。
他们都说{person}的声音非常{sounds}。
没有人看见{person2}和{animal}。
{person}，不要忘了带{thing}！
我想让{person2}看一看{place}的{animal}。
"""

_CMN_WORDS = """
person: 妈妈|爸爸|王明|宝宝|小波|马老师|芳芳|木木|吴伯伯|小雨|冯阿姨
person2: 朋友|婆婆|弟弟|苗苗|小白|方医生|表妹|老板|叔叔
family: 父母|妹妹|爷爷|伯母|孩子|一家人
when: 明天早上|昨天晚上|每个周末|下午|八月|吃饭以前|放学以后|星期五
place: 公园|博物馆|学校|飞机场|北方|海边|图书馆|超市|码头|我家附近|火车站
thing: 一把雨伞|八本书|两幅画|一个包|新皮鞋|白帽子|木头桌子|绿色的瓶子|一部手机|红气球
food: 苹果|面包|葡萄|米饭|包子|蘑菇汤|豆腐|蜜瓜|牛肉面|水饺|胡萝卜
drink: 牛奶|绿茶|豆浆|热水|咖啡
drink2: 冰水|果汁|可乐|白酒
animal: 老虎|小猫|大象|白马|蝴蝶|猴子|胖鸭子|黑狗|绵羊
animal2: 蜜蜂|毛毛虫|狐狸|飞鸟|青蛙
looks: 漂亮|大|特别|好玩|普通|老
taste: 好吃|新鲜|热|香|特别
sounds: 美妙|舒服|特别|好听|温和
number: 八|五|四十二|一百|九|二十六
"""

_SLOT = re.compile(r"\{(\w+)\}")


def _lists(text: str) -> dict[str, tuple[str, ...]]:
    rows = (line.partition(": ") for line in text.strip().splitlines())
    return {name: tuple(words.split("|")) for name, _, words in rows}


_LANGUAGES = {
    "en": (tuple(_EN.strip().splitlines()), _lists(_EN_WORDS)),
    "cmn": (tuple(_CMN.strip().splitlines()), _lists(_CMN_WORDS)),
}


def sentence(language: str, rng: np.random.Generator) -> str:
    """One sentence in ``language`` (a name in LANGUAGES), chosen by ``rng``."""
    templates, words = _LANGUAGES[language]
    template = templates[rng.integers(len(templates))]
    text = _SLOT.sub(lambda slot: words[slot[1]][rng.integers(len(words[slot[1]]))], template)
    return text[0].upper() + text[1:]


def every_word(language: str) -> tuple[str, ...]:
    """Each template and each word once, for checks that nothing a speaker may say is unknown."""
    templates, words = _LANGUAGES[language]
    first = {name: options[0] for name, options in words.items()}
    filled = (_SLOT.sub(lambda slot: first[slot[1]], template) for template in templates)
    return (*filled, *(word for options in words.values() for word in options))


def expected_seconds(text: str, language: str, words_per_minute: int) -> float:
    """About how long espeak-ng takes, pauses between sentences included; measured on these templates."""
    letters = sum(character.isalnum() for character in text)
    pauses = sum(character in ".?!,。？！，" for character in text)
    per_letter, per_pause = _PACE[language]
    return (per_letter * letters + per_pause * pauses) * 175 / words_per_minute


_PACE = {"en": (0.060, 0.30), "cmn": (0.22, 0.30)}  # seconds at 175 words per minute
