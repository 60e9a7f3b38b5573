// The page answers without this: it adds copying, wiping, an option's code in place, and the search.
"use strict";
for (const box of document.querySelectorAll(".copy")) {
  const button = document.createElement("button");
  button.type = "button";
  button.textContent = "Copy";
  button.setAttribute("aria-label", "Copy: " + box.dataset.title);
  button.addEventListener("click", async () => {
    const text = box.querySelector("code").textContent;
    try {
      await navigator.clipboard.writeText(text);
    } catch {
      const area = document.body.appendChild(document.createElement("textarea"));
      area.value = text;
      area.select();
      document.execCommand("copy");
      area.remove();
    }
    button.textContent = "Copied";
    setTimeout(() => (button.textContent = "Copy"), 1500);
  });
  box.append(button);
}
for (const pair of document.querySelectorAll(".pair")) {
  pair.classList.remove("still");
  pair.querySelector("input").addEventListener("input", (e) => pair.style.setProperty("--wipe", e.target.value + "%"));
}
for (const link of document.querySelectorAll("[data-option]")) {
  link.addEventListener("click", (event) => {
    event.preventDefault();
    const part = link.closest(".options");
    for (const old of part.querySelectorAll(".chosen")) old.classList.remove("chosen");
    const option = document.getElementById(link.dataset.option);
    for (const one of part.querySelectorAll(`[data-option="${link.dataset.option}"]`)) one.classList.add("chosen");
    option.classList.add("chosen");
    option.scrollIntoView({ block: "nearest" });
  });
}
const field = document.getElementById("ask"), found = document.getElementById("found");
const NUMBERS = { two: "2", four: "4", eight: "8", "2x": "2", "4x": "4", "8x": "8" };
const DULL = new Set("a an the is are it its i me on in of for to at and or do does what which how with by be can should".split(" "));
const words = (text) =>
  (text.toLowerCase().replace(/×/g, "x").replace(/ꟻ/g, "f").replace(/['’]s\b/g, "").match(/[\w.+-]+/g) || [])
    .map((w) => w.replace(/^[.+-]+|[.+-]+$/g, "").replace(/^gpus$/, "gpu")).map((w) => NUMBERS[w] || w).filter(Boolean);
const answers = [...document.querySelectorAll("#every li")].map((li) => ({ li, own: words(li.textContent), name: words(li.firstElementChild.textContent).join(" "), defines: ["term", "technique"].includes(li.dataset.kind), also: new Set(words(li.dataset.words)), subject: new Set(words(li.firstElementChild.textContent).flatMap((w) => [w, ...w.split(/[-_]/).filter((part) => part.length > 2)])) }));
const matches = (answer, word) => {
  if (answer.subject.has(word)) return 2;
  if (answer.also.has(word)) return 1;
  if (/^[\d.]+x?$/.test(word) && [...answer.subject].some((w) => /^[\d.]+x?$/.test(w) && parseFloat(w) === parseFloat(word) && w.endsWith("x") >= word.endsWith("x"))) return 2;
  if (word.length > 3 && [...answer.subject].some((w) => [`${w}s`, `${w}es`].includes(word))) return 1.5;
  const number = /^\d/.test(word) ? word.replace(/x$/, "") : word;
  if ([...answer.subject].some((w) => w.startsWith(number) && !/^\d+$/.test(number))) return 1.5;
  return answer.own.some((w) => w === word || (w.startsWith(number) && number.length > 2)) ? 0.7 : 0;
};
field.closest("[hidden]").hidden = false;
function search() {
  const asked = words(field.value).filter((w) => !DULL.has(w));
  const weight = asked.map((word) => {
    const hits = answers.filter((a) => matches(a, word)).length;
    return hits ? Math.log(1 + answers.length / hits) : 0;
  });
  const meant = asked.join(" "), what = /^\s*(what('s|’s| is| are)|define|explain|meaning)\b|\bmean(s|ing)?\b/i.test(field.value);
  // what a word means comes first where it is asked, or where nothing but the word is
  const first = (a) => (!a.defines ? 0 : a.name === meant ? 90 : what && asked.every((w) => matches(a, w) > 1) ? 60 : 0);
  const ranked = answers
    .map((a) => [(a.li.dataset.few ? 0.75 : 1) * asked.reduce((sum, word, i) => sum + weight[i] * matches(a, word), 0) + (asked.length ? first(a) : 0), a.li])
    .filter(([score]) => score > 0)
    .sort((a, b) => b[0] - a[0]);
  found.replaceChildren(...ranked.slice(0, 6).map(([, li]) => li.cloneNode(true)));
  if (asked.length && !ranked.length) found.textContent = "Nothing here has these words; all answers are listed below.";
}
field.addEventListener("input", search);
