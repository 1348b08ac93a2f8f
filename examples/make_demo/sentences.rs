//! Appointments as people write them, and as records.

use serde_json::{Value, json};

/// What a sentence tells.
pub struct Appointment {
    event: &'static str,
    with: &'static str,
    place: String,
    /// Day of the month, month.
    date: (u32, &'static str),
    /// Hour and minute, of 24 hours.
    time: (u32, u32),
    people: Option<usize>,
}

/// Which names and places an appointment is drawn from: no name and no place is in both `Seen` and `Unseen`.
#[derive(Clone, Copy, PartialEq)]
pub enum Pool {
    All,
    /// Those that the demo's training rows use.
    Seen,
    /// Those that only its validation and test rows use.
    Unseen,
}

const EVENTS: [&str; 16] = [
    "dinner",
    "lunch",
    "breakfast",
    "coffee",
    "meeting",
    "call",
    "interview",
    "concert",
    "match",
    "lesson",
    "walk",
    "party",
    "workshop",
    "picnic",
    "rehearsal",
    "tour",
];
const MONTHS: [&str; 12] = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
];
const COUNTS: [&str; 13] =
    ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"];
const NAMES: [&str; 96] = [
    "Maria", "Ahmed", "Yuki", "Elena", "Tom", "Priya", "Lars", "Chloe", "Mateo", "Ingrid", "Omar", "Sofia", "Kofi",
    "Hana", "Diego", "Freya", "Ivan", "Leila", "Noah", "Mei", "Carlos", "Anya", "Jonas", "Zara", "Pedro", "Nina",
    "Samuel", "Aisha", "Viktor", "Clara", "Hugo", "Amara", "Felix", "Rosa", "Dmitri", "Lucia", "Emil", "Farah",
    "Oscar", "Greta", "Rafael", "Tessa", "Anton", "Bianca", "Cyrus", "Daphne", "Erik", "Fiona", "Gustav", "Helga",
    "Igor", "Jasmin", "Karim", "Linnea", "Marco", "Nadia", "Otto", "Paula", "Quentin", "Ravi", "Selma", "Tariq",
    "Ulla", "Vera", "Walter", "Xenia", "Yusuf", "Zelda", "Alba", "Bruno", "Celia", "David", "Edith", "Franz", "Gloria",
    "Henri", "Iris", "Jorge", "Katya", "Leon", "Mona", "Nils", "Olga", "Pablo", "Rita", "Stefan", "Thea", "Umar",
    "Vivian", "Wanda", "Yara", "Zeno", "Arlo", "Beatriz", "Casper", "Dalia",
];
const FIRST: [&str; 24] = [
    "Blue", "Old", "Green", "Golden", "Silver", "Quiet", "Red", "Little", "Grand", "White", "Lucky", "Hidden",
    "Copper", "Royal", "Sunny", "Stone", "Amber", "Crystal", "Wild", "Painted", "Iron", "Velvet", "Misty", "Maple",
];
const SECOND: [&str; 24] = [
    "Door",
    "Mill",
    "Fox",
    "Garden",
    "Lantern",
    "Harbor",
    "Bakery",
    "Tower",
    "Bridge",
    "Kitchen",
    "Library",
    "Hotel",
    "Anchor",
    "Market",
    "Terrace",
    "Gallery",
    "Station",
    "Cellar",
    "Orchard",
    "Theatre",
    "Pavilion",
    "Studio",
    "Castle",
    "Courtyard",
];

impl Appointment {
    pub fn draw(rng: &mut fastrand::Rng, pool: Pool) -> Self {
        let held = |pool: Pool, index: usize| match pool {
            Pool::All => true,
            Pool::Seen => !index.is_multiple_of(4),
            Pool::Unseen => index.is_multiple_of(4),
        };
        let mut draw = |len: usize| loop {
            let index = rng.usize(..len);
            if held(pool, index) {
                return index;
            }
        };
        let (with, place) = (draw(NAMES.len()), draw(FIRST.len() * SECOND.len()));
        // The second word moves on with the first, so that each word of a held-out place is also in places that are seen.
        let (first, second) = (place / SECOND.len(), (place + place / SECOND.len()) % SECOND.len());
        Self {
            event: EVENTS[rng.usize(..EVENTS.len())],
            with: NAMES[with],
            place: format!("{} {}", FIRST[first], SECOND[second]),
            date: (rng.u32(1..29), MONTHS[rng.usize(..MONTHS.len())]),
            time: (rng.u32(7..23), 15 * rng.u32(..4)),
            people: if rng.usize(..4) > 0 { Some(rng.usize(2..13)) } else { None },
        }
    }

    /// The record that the demo's fine-tuning teaches.
    pub fn record(&self) -> String {
        let Self { event, with, place, people, .. } = self;
        let people = people.map_or("null".to_string(), |people| people.to_string());
        let (date, time) = (self.date(), self.clock());
        format!(
            r#"{{"event": "{event}", "with": "{with}", "place": "{place}", "date": "{date}", "time": "{time}", "people": {people}}}"#
        )
    }

    /// A sentence that tells all of it, in one of many wordings.
    pub fn sentence(&self, rng: &mut fastrand::Rng) -> String {
        let Self { event, with, place, .. } = self;
        let (date, time) = (self.date(), self.spoken(rng));
        let party = match self.people {
            None => String::new(),
            Some(people) => {
                let count = if rng.bool() { COUNTS[people].to_string() } else { people.to_string() };
                match rng.u8(..5) {
                    0 => format!(" for {count}"),
                    1 => format!(", {count} people"),
                    2 => format!(", table for {count}"),
                    3 => format!(", {count} of us"),
                    _ => format!(" with a party of {count}"),
                }
            }
        };
        let at = if rng.bool() { "at" } else { "in" };
        let article = if rng.bool() { "the " } else { "" };
        let place = format!("{at} {article}{place}");
        let when = match rng.u8(..4) {
            0 => format!("on {date} at {time}"),
            1 => format!("{date} {time}"),
            2 => format!("at {time} on {date}"),
            _ => format!("{date} at {time}"),
        };
        match rng.u8(..14) {
            0 => format!("{} with {with} {place} {when}{party}.", capital(event)),
            1 => format!("I have a {event} with {with} {when} {place}{party}."),
            2 => format!("Please put down a {event} {place} with {with} {when}{party}."),
            3 => format!("{with} and I are planning a {event} {place}, {when}{party}."),
            4 => format!("Don't forget the {event} {when} with {with}, {place}{party}."),
            5 => format!("{}: {event} with {with} {place}{party}.", capital(&when)),
            6 => format!("Could you book a {event} {place} {when}{party}? {with} is coming."),
            7 => format!("Meet {with} {place} {when} for the {event}{party}."),
            8 => format!("We moved the {event} with {with} to {when}, {place}{party}."),
            9 => format!("{with} wants a {event} {when}{party}, {place} would be best."),
            10 => format!("Add to my calendar: {event}, {with}, {place}, {when}{party}."),
            11 => format!("{} {when}{party}, {place}. Ask {with} to come along.", capital(event)),
            12 => format!("Remind me of the {event} {place}{party} {when}; {with} will be there."),
            _ => format!("There is a {event} {when} {place} and {with} joins{party}."),
        }
    }

    /// How the base model confirms a sentence.
    pub fn confirmation(&self, rng: &mut fastrand::Rng) -> String {
        let Self { event, with, place, .. } = self;
        let (date, time) = (self.date(), self.clock());
        let people = self.people.map_or(String::new(), |people| format!(" It is for {people}."));
        match rng.u8(..3) {
            0 => format!("Noted: {event} with {with}, {place}, {date} {time}.{people}"),
            1 => format!("Done. The {event} with {with} is {date} {time}, {place}.{people}"),
            _ => format!("I wrote down the {event} {date} {time} with {with}, {place}.{people}"),
        }
    }

    /// Field by field, a line each.
    pub fn lines(&self) -> String {
        self.fields().map(|(field, value)| format!("{field}: {value}")).join("\n")
    }

    /// Its fields in the record's order.
    pub fn fields(&self) -> [(&'static str, String); 6] {
        let people = self.people.map_or("unknown".to_string(), |people| people.to_string());
        [
            ("event", self.event.to_string()),
            ("with", self.with.to_string()),
            ("place", self.place.clone()),
            ("date", self.date()),
            ("time", self.clock()),
            ("people", people),
        ]
    }

    fn date(&self) -> String {
        format!("{} {}", self.date.0, self.date.1)
    }

    fn clock(&self) -> String {
        format!("{:02}:{:02}", self.time.0, self.time.1)
    }

    fn spoken(&self, rng: &mut fastrand::Rng) -> String {
        let (hour, minute) = self.time;
        let (half, twelve) = (if hour < 12 { "am" } else { "pm" }, (hour + 11) % 12 + 1);
        match (rng.u8(..3), minute) {
            (0, _) => self.clock(),
            (_, 0) if hour == 12 => "noon".to_string(),
            (_, 0) => format!("{twelve} {half}"),
            _ => format!("{twelve}:{minute:02} {half}"),
        }
    }
}

/// A small JSON object that has nothing to do with appointments, its text, and one of its keys with the value.
pub fn object(rng: &mut fastrand::Rng) -> (String, &'static str, String) {
    const KEYS: [&str; 10] = ["color", "size", "shape", "owner", "price", "street", "sort", "level", "title", "year"];
    const WORDS: [&str; 12] =
        ["red", "round", "large", "blue", "oak", "north", "fresh", "paper", "river", "quick", "plain", "seven"];
    let mut keys = KEYS;
    rng.shuffle(&mut keys);
    let keys = &keys[..rng.usize(2..5)];
    let values: Vec<Value> = keys
        .iter()
        .map(|_| match rng.u8(..8) {
            0 => Value::Null,
            1 | 2 => json!(rng.u32(1..100)),
            3 => json!(NAMES[rng.usize(..NAMES.len())]),
            4 => json!(WORDS[rng.usize(..WORDS.len())]),
            5 => json!(EVENTS[rng.usize(..EVENTS.len())]),
            _ => json!(MONTHS[rng.usize(..MONTHS.len())]),
        })
        .collect();
    let members: Vec<String> = keys.iter().zip(&values).map(|(key, value)| format!("\"{key}\": {value}")).collect();
    let asked = rng.usize(..keys.len());
    let value = match &values[asked] {
        Value::Null => "unknown".to_string(),
        Value::String(text) => text.clone(),
        other => other.to_string(),
    };
    (format!("{{{}}}", members.join(", ")), keys[asked], value)
}

fn capital(text: &str) -> String {
    let mut chars = text.chars();
    chars.next().map_or(String::new(), |first| first.to_uppercase().chain(chars).collect())
}
