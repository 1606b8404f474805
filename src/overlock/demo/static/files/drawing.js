// Heat maps over the photo, bars and tables.

// Five of the colours of matplotlib's inferno, which brightens evenly.
const INFERNO = [[0, 0, 4], [87, 16, 110], [188, 55, 84], [249, 142, 9], [252, 255, 164]];
const STRENGTH = 0.6; // of a map over the photo
const FIGURE = 200; // side in pixels

/** Draws the photo with a cross at the point. */
export function drawPhoto(canvas, square, point) {
  canvas.getContext("2d").drawImage(square, 0, 0, canvas.width, canvas.height);
  drawCross(canvas, point);
}

/** Draws {values, rows, columns, box} over the photo; without a box over all of it. Smooth, or cell by cell. */
export function drawMap(canvas, square, map, point, smooth) {
  const context = canvas.getContext("2d");
  const { width, height } = canvas;
  context.globalAlpha = 1;
  context.drawImage(square, 0, 0, width, height);
  const [left, top, across, down] = map.box ?? [0, 0, 1, 1];
  const place = [left * width, top * height, across * width, down * height];
  context.globalAlpha = STRENGTH;
  context.imageSmoothingEnabled = smooth;
  context.imageSmoothingQuality = "high";
  context.drawImage(paint(map), ...place);
  context.globalAlpha = 1;
  context.imageSmoothingEnabled = true;
  if (map.box) {
    context.strokeStyle = "white";
    context.lineWidth = 2;
    context.strokeRect(place[0] + 1, place[1] + 1, place[2] - 2, place[3] - 2);
  }
  drawCross(canvas, point);
}

/** A class's map of an output (1, N, H, W), what is below zero left out; of an output of one channel that one. */
export function mapOf(output, label) {
  const [, channels, rows, columns] = output.dims;
  const start = channels > 1 ? label * rows * columns : 0;
  const values = output.data.subarray(start, start + rows * columns).map((value) => Math.max(value, 0));
  return { values, rows, columns };
}

/** Fills a grid with figures of maps, each with its caption. */
export function fillGrid(grid, square, maps, point) {
  while (grid.children.length > maps.length) grid.lastChild.remove();
  while (grid.children.length < maps.length) grid.append(makeFigure());
  maps.forEach((map, i) => {
    const [canvas, caption] = grid.children[i].children;
    caption.textContent = map.caption;
    canvas.setAttribute("aria-label", map.caption);
    drawMap(canvas, square, map, point, false);
  });
}

/** Fills a list with classes and their bars. */
export function fillClasses(list, classes) {
  list.replaceChildren(...classes.map(({ name, share }) => {
    const [row, bar, label, number] = ["li", "div", "span", "span"].map((tag) => document.createElement(tag));
    bar.className = "bar";
    bar.style.width = `${100 * share}%`;
    label.textContent = name;
    number.textContent = `${(100 * share).toFixed(1)} %`;
    row.append(bar, label, number);
    return row;
  }));
}

/** A table of a name and two numbers a row. */
export function makeTable(title, head, rows) {
  const table = document.createElement("table");
  table.createCaption().textContent = title;
  const top = table.createTHead().insertRow();
  head.forEach((name, i) => {
    const cell = document.createElement("th");
    cell.scope = "col";
    cell.textContent = name;
    cell.className = i ? "number" : "";
    top.append(cell);
  });
  const body = table.createTBody();
  for (const [name, ...numbers] of rows) {
    const row = body.insertRow();
    row.insertCell().textContent = name;
    for (const number of numbers) {
      const cell = row.insertCell();
      cell.className = "number";
      cell.textContent = number.toFixed(3);
    }
  }
  return table;
}

function makeFigure() {
  const [figure, canvas, caption] = ["figure", "canvas", "figcaption"].map((tag) => document.createElement(tag));
  canvas.width = canvas.height = FIGURE;
  canvas.setAttribute("role", "img");
  figure.append(canvas, caption);
  return figure;
}

function paint({ values, rows, columns }) {
  const most = Math.max(...values) || 1;
  const image = new ImageData(columns, rows);
  values.forEach((value, i) => {
    const place = Math.min(Math.max(value / most, 0), 1) * (INFERNO.length - 1);
    const below = Math.min(Math.floor(place), INFERNO.length - 2);
    INFERNO[below].forEach((colour, channel) => {
      image.data[4 * i + channel] = colour + (INFERNO[below + 1][channel] - colour) * (place - below);
    });
    image.data[4 * i + 3] = 255;
  });
  const canvas = new OffscreenCanvas(columns, rows);
  canvas.getContext("2d").putImageData(image, 0, 0);
  return canvas;
}

function drawCross(canvas, [x, y]) {
  const context = canvas.getContext("2d");
  const arm = canvas.width / 25;
  for (const [colour, width] of [["black", 4], ["white", 2]]) {
    context.strokeStyle = colour;
    context.lineWidth = width;
    context.beginPath();
    context.moveTo(x * canvas.width - arm, y * canvas.height);
    context.lineTo(x * canvas.width + arm, y * canvas.height);
    context.moveTo(x * canvas.width, y * canvas.height - arm);
    context.lineTo(x * canvas.width, y * canvas.height + arm);
    context.stroke();
  }
}
