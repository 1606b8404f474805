// The page: what a visitor does, and what is drawn then. All that it knows is in `view`.

import { drawMap, drawPhoto, fillClasses, fillGrid, makeTable, mapOf } from "./drawing.js";
import { affinityOf, changeOf, kernelsOf } from "./kernels.js";
import { Network, uniformPrior, zeroPrior } from "./network.js";
import { PhotoError, readPhoto } from "./photo.js";

const OWN = "its own";
const ZEROS = "zeros: no prior at all";
const UNIFORM = "uniform: its own mean everywhere";
const STEP = 0.02; // of an arrow key, as a share of the photo's side
const ARROWS = { ArrowLeft: [-STEP, 0], ArrowRight: [STEP, 0], ArrowUp: [0, -STEP], ArrowDown: [0, STEP] };

const $ = (id) => document.getElementById(id);
const view = { photo: null, chosen: null, glance: null, look: null, swapped: null, point: [0.5, 0.5], block: 0, prior: OWN };
let about, network;
let lastWish = Promise.resolve();
let otherPhoto = null; // a visitor's own, for its prior

async function start() {
  about = await (await fetch("page.json")).json();
  $("name").textContent = about.name;
  $("runtime").textContent = about.runtime;
  document.title += ` (${about.name})`;
  $("overview_note").textContent = about.has_class_overview
    ? "What a glance finds of the first class, by Overview-Net's auxiliary classifier."
    : "Where the glance differs from its mean over the photo. This network has no auxiliary classifier for a class's map.";
  $("focus_note").textContent = "What each place adds to the first class, in Focus-Net's last stage.";
  network = await Network.load(about, (share) => say(`Loading the network: ${Math.round(100 * share)} %`));
  for (const [i, block] of about.blocks.entries()) $("block").append(new Option(block.name, i));
  for (const name of [OWN, ZEROS, UNIFORM, ...about.photos.map((photo) => photo.name)]) $("prior").append(new Option(name));
  $("photos").append(...about.photos.map(makeThumbnail));
  connect();
  $("page").hidden = false;
  await restore(new URLSearchParams(location.search));
}

function makeThumbnail({ name, file }) {
  const [button, image] = ["button", "img"].map((tag) => document.createElement(tag));
  image.src = file;
  image.alt = name;
  button.type = "button";
  button.title = name;
  button.append(image);
  button.addEventListener("click", () => attempt(() => choose(name)));
  return button;
}

function connect() {
  for (const canvas of document.querySelectorAll("canvas.point")) {
    canvas.addEventListener("click", (event) => move([event.offsetX / canvas.clientWidth, event.offsetY / canvas.clientHeight]));
  }
  $("photo").addEventListener("keydown", (event) => {
    const step = ARROWS[event.key];
    if (!step) return;
    event.preventDefault();
    move(view.point.map((place, i) => place + step[i]));
  });
  $("block").addEventListener("change", () => {
    view.block = $("block").selectedIndex;
    drawPoint();
  });
  $("prior").addEventListener("change", () => attempt(swap));
  takeFiles("drop", "upload", (file) => show(file, file.name, null));
  takeFiles("prior_drop", "prior_upload", async (file) => {
    otherPhoto = await readPhoto(file, file.name, about.limits);
    const option = Array.from($("prior").options).find((one) => one.dataset.own) ?? new Option();
    option.text = option.value = `${file.name} (yours)`;
    option.dataset.own = "yes";
    $("prior").append(option);
    $("prior").value = option.value;
    await swap();
  });
}

function takeFiles(area, input, take) {
  const takeFirst = ([file]) => file && attempt(() => take(file)); // taken now: the list is emptied below
  $(input).addEventListener("change", () => {
    takeFirst($(input).files);
    $(input).value = ""; // so that the same file can be given again
  });
  for (const kind of ["dragover", "dragleave", "drop"]) {
    $(area).addEventListener(kind, (event) => {
      event.preventDefault();
      $(area).classList.toggle("over", kind === "dragover");
      if (kind === "drop") takeFirst(event.dataTransfer.files);
    });
  }
}

/** The view of the page's address; the usual one for what it lacks or what means nothing here. */
async function restore(query) {
  const names = about.photos.map((photo) => photo.name);
  const known = (name, others) => (others.includes(name) ? name : others[0]);
  view.point = ["x", "y"].map((axis) => within(Number(query.get(axis) ?? 50) / 100));
  view.block = Math.min(Math.max((Number.parseInt(query.get("block"), 10) || 1) - 1, 0), about.blocks.length - 1);
  $("block").selectedIndex = view.block;
  $("prior").value = known(query.get("prior"), [OWN, ZEROS, UNIFORM, ...names]);
  await attempt(() => choose(known(query.get("photo"), names)));
}

async function choose(name) {
  await show(await fetchPhoto(name), name, name);
}

async function fetchPhoto(name) {
  const answer = await fetch(about.photos.find((photo) => photo.name === name).file);
  if (!answer.ok) throw new PhotoError(`${name} cannot be fetched (${answer.status}); is the folder whole?`);
  return answer.blob();
}

async function show(file, name, chosen) {
  const photo = await readPhoto(file, name, about.limits);
  say(`Looking at ${name}`);
  const glance = await network.glance(photo);
  const look = await network.look(glance, glance.prior);
  Object.assign(view, { photo, chosen, glance, look });
  for (const button of $("photos").children) button.setAttribute("aria-pressed", button.title === chosen);
  $("note").textContent = photo.note;
  fillClasses($("classes"), look.classes);
  await swap();
  say(`${name}: ${look.classes[0].name}, ${(100 * look.classes[0].share).toFixed(1)} %`);
}

/** The same photo with the chosen context prior. */
async function swap() {
  view.prior = $("prior").value;
  if (view.prior === OWN) {
    view.swapped = null;
  } else {
    say(`Looking with the prior of ${view.prior}`);
    view.swapped = await network.look(view.glance, await priorOf(view.prior));
    say(`With the prior of ${view.prior}: ${view.swapped.classes[0].name}`);
  }
  const { swapped } = view;
  $("prior_note").hidden = swapped !== null;
  fillClasses($("new_classes"), swapped ? swapped.classes : []);
  $("changes").replaceChildren(...(swapped ? [makeChanges(swapped)] : []));
  drawPoint();
}

async function priorOf(name) {
  if (name === ZEROS) return zeroPrior(view.glance.prior);
  if (name === UNIFORM) return uniformPrior(view.glance.prior);
  const photo = about.photos.some((one) => one.name === name)
    ? await readPhoto(await fetchPhoto(name), name, about.limits)
    : otherPhoto;
  return (await network.glance(photo)).prior;
}

function makeChanges(swapped) {
  const rows = about.blocks.map((block, i) => {
    const change = changeOf(view.look, swapped, i, block);
    return [block.name, change.kernels, change.affinity];
  });
  return makeTable(`With the prior of ${view.prior}`, ["block", "kernels moved", "affinity changed"], rows);
}

function move(point) {
  view.point = point.map(within);
  drawPoint();
}

/** All that depends on the point, from outputs that are there already: a click runs no network. */
function drawPoint() {
  const { photo, glance, look, swapped, point, block } = view;
  if (!photo) return;
  drawPhoto($("photo"), photo.square, point);
  drawMap($("overview"), photo.square, mapOf(glance.maps, look.first), point, true);
  drawMap($("focus"), photo.square, mapOf(look.outputs.maps, look.first), point, true);
  $("place").textContent = point.map((place, i) => `${Math.round(100 * place)} % from the ${["left", "top"][i]}`).join(", ");
  const affinities = about.blocks.map((one, i) => ({ ...affinityOf(look, i, one, point), caption: one.name }));
  fillGrid($("affinities"), photo.square, affinities, point);
  fillBlock($("kernels"), $("kernels_title"), look, OWN.replace("its", "with its") + " prior");
  $("swapped").hidden = !swapped;
  if (swapped) fillBlock($("swapped_kernels"), $("swapped_title"), swapped, `with the prior of ${view.prior}`);
  keepLink(block);
}

function fillBlock(grid, title, look, prior) {
  const block = about.blocks[view.block];
  title.textContent = `${block.name[0].toUpperCase()}${block.name.slice(1)}, ${prior}`;
  const kernels = kernelsOf(look, view.block, block, view.point);
  fillGrid(grid, view.photo.square, [
    { ...affinityOf(look, view.block, block, view.point), caption: "affinity" },
    ...kernels.map((one) => ({ ...one, caption: `group ${one.group}, ${one.rows} x ${one.columns}` })),
  ], view.point);
}

/** The page's address becomes a link to the view; a visitor's own photos are in none. */
function keepLink() {
  const [x, y] = view.point.map((place) => (100 * place).toFixed(1));
  const names = about.photos.map((photo) => photo.name);
  const prior = [OWN, ZEROS, UNIFORM, ...names].includes(view.prior) ? view.prior : OWN;
  const query = new URLSearchParams({ photo: view.chosen, x, y, block: view.block + 1, prior });
  history.replaceState(null, "", view.chosen ? `?${query}` : location.pathname);
}

function within(place) {
  return Number.isFinite(place) ? Math.min(Math.max(place, 0), 1) : 0.5;
}

/** Does what a visitor asked for once all that was asked before is done, so that two wishes never mix. */
function attempt(act) {
  lastWish = lastWish.then(() => fulfil(act));
  return lastWish;
}

/** What goes wrong is told in a sentence, and what was shown stays. */
async function fulfil(act) {
  $("error").hidden = true;
  try {
    await act();
  } catch (error) {
    complain(error instanceof PhotoError ? error.message : `This did not work: ${error.message}.`);
    if (view.photo) say("");
  }
}

function say(sentence) {
  $("status").textContent = sentence;
}

function complain(sentence) {
  $("error").textContent = sentence;
  $("error").hidden = false;
}

start().catch((error) => {
  say("");
  complain(`The page cannot start: ${error.message}. It needs a browser of 2023 or newer, and a file server.`);
});
